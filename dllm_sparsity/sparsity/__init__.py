"""The shared core: rules, sites, the clock, the ledger and metrics. Knows no model, no task and no loop."""
