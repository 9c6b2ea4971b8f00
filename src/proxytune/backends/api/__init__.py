"""A base behind an API: what its server shows, asked for and proved."""
