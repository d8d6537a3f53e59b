// The page to play with: shows the published row of the chosen network, image and noise.
document.addEventListener("DOMContentLoaded", () => {
  const form = document.querySelector(".play");
  if (!form) return;
  const networks = JSON.parse(document.getElementById("play-rows").textContent);
  const [choice, slider, pictures] = [form.elements.network, form.elements.level, form.querySelector("fieldset")];
  const put = (id, text) => { document.getElementById(`play-${id}`).textContent = text; };
  const show = () => {
    const image = networks[choice.value].images[form.elements.image.value];
    const row = image.levels[slider.value];
    const about = { private: image.label, predicted: `RMSE ${row.expected}`, recovered: `RMSE ${row.measured}` };
    for (const [name, words] of Object.entries(about)) {
      const picture = document.getElementById(`play-${name}`);
      picture.src = row[name] ?? image[name];
      picture.alt = `${name} image, ${words}`;
      put(`${name}-error`, words);
    }
    slider.setAttribute("aria-valuetext", `variance ${row.variance}`);
    put("variance", `variance ${row.variance}`);
    put("note", row.converged ? "" : "This attack ended before it converged: its picture says nothing about the minimum.");
  };
  const choose = () => {
    const images = networks[choice.value].images;
    pictures.querySelectorAll("label").forEach((label) => label.remove());
    for (const [number, image] of Object.entries(images)) {
      const label = document.createElement("label"), radio = document.createElement("input");
      Object.assign(radio, { type: "radio", name: "image", value: number, checked: number === Object.keys(images)[0] });
      label.append(radio, Object.assign(new Image(), { src: image.private, alt: image.label }));
      pictures.append(label);
    }
    slider.max = Object.values(images)[0].levels.length - 1;
    slider.value = Math.round(slider.max / 2);
    show();
  };
  form.addEventListener("input", (event) => (event.target === choice ? choose() : show()));
  form.addEventListener("submit", (event) => event.preventDefault());
  choose();
});
