"""JSON schemas that answers have to meet: checked in a process of their own, then followed token by token."""
