"""Weight synchronisation from the policy to the rollout engine, after every update."""
