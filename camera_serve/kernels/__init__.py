"""A ragged layer and routed tokens go in; its output comes out, fast."""
