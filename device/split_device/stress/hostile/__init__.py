"""`lambda-split stress --hostile`: one member of the fleet does its worst, beside honest ones."""
