"""The stored form: what every byte of a page means, where pages lie, and the words that codes are packed into."""
