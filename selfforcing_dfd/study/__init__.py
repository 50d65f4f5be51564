"""Studies: many runs of many arms from several starts, measured along their way, and compared."""
