"""The colours of every figure: Okabe and Ito's, safe for colour-blind readers."""

INK, LINE, GRID = "#333333", "#888888", "#e4e4e4"
BLUE, VERMILION, GREEN, AMBER, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
