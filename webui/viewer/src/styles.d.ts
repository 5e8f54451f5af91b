/** Style sheets are imported for their effect: Vite collects them into viewer.css. */
declare module "*.css";
