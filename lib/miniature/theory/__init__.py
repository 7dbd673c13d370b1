"""Theory: problem generators, algorithms and the curves they are judged by.

Engines: `rates` (exponents over a grid of sizes), `counting` (operations and oracle queries),
`search` (exact and classical nearest-neighbor search, recall, distance evaluations). A paper is one
file beside its engine.
"""
