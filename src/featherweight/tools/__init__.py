"""What a method's author may use: costs, simulation."""
