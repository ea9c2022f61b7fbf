"""Token ids to a store: built in one reading of the data, resumed, opened, accounted for."""
