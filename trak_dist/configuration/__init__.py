"""Settings: their types and limits, their validation, mappings to dataclasses and back."""
