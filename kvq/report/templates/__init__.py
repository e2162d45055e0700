"""Templates and style sheet of the reports, data only."""
