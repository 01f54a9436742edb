"""From sympy expressions of `xfcompile.score` and `xfcompile.activation` to the text of Triton expressions."""
