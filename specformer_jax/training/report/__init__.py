"""What a run is going to do, said before it begins: the data as they are packed, the cost of a step, samples."""
