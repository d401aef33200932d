"""One function a figure: tidy tables from results/ in, a matplotlib figure out. Nothing here imports torch or df11."""
