"""Layer shapes go in; the speed of our kernels, of their rivals and of the machine comes out."""
