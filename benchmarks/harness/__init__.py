"""What the commands share: the prompts, who takes part, taking turns, the machine's figures, reports and pictures."""
