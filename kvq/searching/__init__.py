"""Mixed precision chosen by measurement: sensitivities, allocation under a budget, verification on unseen text."""
