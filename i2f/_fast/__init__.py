"""What only makes J faster or smaller: rules of layers, reused memory, forecasts of what products take."""
