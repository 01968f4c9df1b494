"""What carries every adapter: the contract of a method (`method`), rows routed to adapters (`routing`), and the sites
where these touch a frozen model (`sites`, with `rows`, `tokens` and `weights` for what a site has before it). `host`
has a model and its adapters: attach, route, activate, count, detach."""
