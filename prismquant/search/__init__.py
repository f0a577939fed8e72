"""Search for a mix of formats: what each loses and costs, and the best mix within a budget."""
