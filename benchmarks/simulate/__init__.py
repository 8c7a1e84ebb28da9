"""What a budget of draft tokens shared by confidence would bring on chips that are not here: a simulation."""
