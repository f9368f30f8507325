"""From raw images to task groups: sources, the prepared store, the group tables."""
