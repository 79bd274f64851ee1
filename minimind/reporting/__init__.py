"""Reports made from run directories alone: HTML, Markdown, plots, scaling fits. No torch."""
