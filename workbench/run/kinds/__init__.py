"""What each kind of step does at composition."""
