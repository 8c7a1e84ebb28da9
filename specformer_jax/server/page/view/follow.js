// A log that shows its end while it grows, unless whoever reads has moved up.

const NEAR = 40; // pixels from the end that still count as the end

export class Follow {
  constructor(log, button) {
    Object.assign(this, { log, button, following: true, top: 0 });
    log.addEventListener("scroll", () => {
      // Only a move up stops it: the log may have grown since the move that this event tells of.
      if (this.atEnd) this.following = true;
      else if (log.scrollTop < this.top) this.following = false;
      this.top = log.scrollTop;
      this.button.hidden = this.following;
    });
    button.addEventListener("click", () => {
      this.toEnd();
      log.focus({ preventScroll: true }); // the button goes away
    });
    new ResizeObserver(() => this.grown()).observe(log);
  }

  get atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    return scrollHeight - scrollTop - clientHeight <= NEAR;
  }

  grown() {
    if (this.following) this.toEnd();
    this.button.hidden = this.following || this.atEnd;
  }

  toEnd() {
    this.following = true;
    this.log.scrollTop = this.log.scrollHeight;
    this.button.hidden = true;
  }
}
