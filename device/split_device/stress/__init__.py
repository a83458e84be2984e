"""`lambda-split stress`: a fleet under faults, whose every output is compared with the unsplit model's."""
