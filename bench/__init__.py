"""Demonstrations and measurements; uses `camera_serve`, never the other way round."""
