"""The report: one page that shows what a run is worth, and why it answers as it does."""
