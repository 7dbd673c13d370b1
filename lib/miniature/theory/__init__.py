"""Theory: problem generators, algorithms and the curves they are judged by.

Engines: `rates` (exponents over a grid of sizes), `counting` (operations and oracle queries),
`search` (exact and classical nearest-neighbor search, recall, distance evaluations), `bandits`
(environments and learners that play many runs at once; streams of arms with bounded memory), `mdp`
(tabular decision processes, exactly), `privacy` (mechanisms, their account, an audit), `submodular`
(set functions whose queries are counted). A paper is one file beside its engine.
"""
