"""Writers: a plan and the reference become a model file that an engine loads."""
