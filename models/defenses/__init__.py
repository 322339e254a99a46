"""One file per defense; `catalog` lists them without importing torch."""
