"""The typed client of internvl-serving."""
