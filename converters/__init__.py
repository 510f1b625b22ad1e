"""A checkpoint goes in; one of another format comes out, one file a format."""
