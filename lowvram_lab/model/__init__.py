"""Chapter 01, a model on paper: its spec, formats, plan, source and checkpoint. Knows no device."""
