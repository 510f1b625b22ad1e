"""Text of the machine goes in; the small MoE that everything here is measured on comes out."""
