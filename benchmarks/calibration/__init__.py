"""How often the verdicts of `gradient_report` are wrong, on networks that it trains."""
