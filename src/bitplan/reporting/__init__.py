"""What the `report` stage is made of: facts, sentences, charts, figures."""
