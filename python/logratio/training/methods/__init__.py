"""The methods: losses of groups of completions, their table, and the objective of a run."""
