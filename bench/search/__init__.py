"""How well scores of sensitivity rank what units lose, and how well mixes found by them do."""
