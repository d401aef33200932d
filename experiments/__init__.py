"""One module a table or figure of the paper: `run(cfg, done)` yields points of rows."""
