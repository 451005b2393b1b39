"""Mathematical answers: one notation for what people type (`notation`), what kind of thing an answer is (`reading`),
and whether two are equal (`comparing`), with sympy and pint in workers alone (`symbols`, `units`).
"""
