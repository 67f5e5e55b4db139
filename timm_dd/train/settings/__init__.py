"""How a run is asked for: flags, YAML files, presets, and what is refused before anything starts."""
