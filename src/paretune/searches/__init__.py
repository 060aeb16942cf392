"""The search: spaces of recipes, what to try next, and what all of it may spend."""
