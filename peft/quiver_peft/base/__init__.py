"""What a base is: its definition, its sites, its attention, and how its checkpoint is read."""
