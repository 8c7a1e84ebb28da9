"""An answer's text as it arrives -> what it says, what it thought, which tools it calls: functions of text alone."""
