"""Other checkpoint formats, one file each, on top of camera_serve."""
