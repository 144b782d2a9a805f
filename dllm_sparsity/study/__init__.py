"""From a configuration to sealed records; importing config, records or rundir never imports torch."""
