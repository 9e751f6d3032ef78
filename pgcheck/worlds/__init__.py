"""What is known of an environment under its policies, by how much of it can be listed.

    worlds.listed    every rollout                              a table, exact in everything
    worlds.tree      every prefix of a language model's text    J and ∇J exact, batches drawn
    worlds.process   states and positions of an MDP             J and ∇J exact, batches drawn
    worlds.written   nothing                                    a model writes, batches drawn

`pgcheck.problem` asks one of them, `World`, and does not know which.
"""
