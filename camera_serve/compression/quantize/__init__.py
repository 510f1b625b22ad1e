"""16-bit rows and routed tokens go in; codes, scales and zeros come out (CAMERA-Q)."""
