// The strip of a model's parts and the text beside it. The person's last move is always right: each goes to the server
// with a number, and what the server says is taken once it has seen that number.
export default {
  props: { state: Object },
  emits: ["move", "rate"],
  data() {
    return { sent: 0, text: this.state.text, local: {}, from: null, to: null, on: true, at: 0, byPointer: false };
  },
  watch: {
    state: {
      deep: true,
      handler(now) {
        if (now.seen < this.sent) return;
        this.sent = now.seen;
        this.text = now.text;
        this.local = {};
      },
    },
  },
  methods: {
    pressed(i) {
      if (this.from !== null) {
        const [low, high] = [Math.min(this.from, this.to), Math.max(this.from, this.to)];
        if (i >= low && i <= high) return this.on;
      }
      const cell = this.state.cells[i];
      return this.local[cell.part] ?? cell.pressed;
    },
    said(cell, i) {
      const words = [cell.title, this.pressed(i) ? "trains" : "frozen"];
      if (cell.fresh) words.push("new block");
      if (cell.rate) words.push(`learning rate ${cell.rate}`);
      if (cell.score !== null) words.push(`score ${cell.score_text}`);
      return words.join(", ");
    },
    move(what) {
      this.sent += 1;
      this.$emit("move", { number: this.sent, ...what });
    },
    typed(event) {
      this.text = event.target.value;
      this.move({ text: this.text });
    },
    down(event, i) {
      if (event.button !== 0) return;
      event.target.closest("button").releasePointerCapture?.(event.pointerId);
      this.on = !this.pressed(i);
      [this.from, this.to, this.at, this.byPointer] = [i, i, i, true];
    },
    over(event) {
      if (this.from === null) return;
      const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest?.("[data-cell]");
      if (cell && this.$el.contains(cell)) this.to = Number(cell.dataset.cell);
    },
    up() {
      if (this.from === null) return;
      const [low, high] = [Math.min(this.from, this.to), Math.max(this.from, this.to)];
      this.from = null;
      this.set(low, high);
    },
    gone() {
      this.from = null; // the browser took the gesture, to scroll the page
    },
    clicked(event, i) {
      const again = this.byPointer && event.detail > 0; // what `up` has done already
      this.byPointer = false;
      if (again) return;
      this.on = !this.pressed(i);
      this.set(i, i);
    },
    set(low, high) {
      const parts = this.state.cells.slice(low, high + 1).map((cell) => cell.part);
      for (const part of parts) this.local[part] = this.on;
      this.move({ parts, on: this.on });
    },
    walk(event, i) {
      const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -i, End: this.state.cells.length - 1 - i };
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.at = Math.max(0, Math.min(this.state.cells.length - 1, i + steps[event.key]));
      this.$nextTick(() => this.$el.querySelector(`[data-cell="${this.at}"]`).focus());
    },
  },
  mounted() {
    window.addEventListener("pointerup", this.up);
    window.addEventListener("pointercancel", this.gone);
  },
  unmounted() {
    window.removeEventListener("pointerup", this.up);
    window.removeEventListener("pointercancel", this.gone);
  },
  template: `
    <div class="lf-choose">
      <div class="lf-strip" role="group" aria-label="Parts of the model, from its input to its output" @pointermove="over">
        <div v-for="(cell, i) in state.cells" :key="cell.part" class="lf-part" :class="{ 'lf-outside': cell.outside }">
          <button
            type="button" class="lf-cell" :class="['lf-is-' + cell.state, { 'lf-fresh': cell.fresh, 'lf-best': cell.best }]"
            :data-cell="i" :data-part="cell.part" :aria-pressed="pressed(i) ? 'true' : 'false'" :aria-label="said(cell, i)"
            :title="said(cell, i)" :tabindex="i === at ? 0 : -1" @pointerdown="down($event, i)"
            @click="clicked($event, i)" @keydown="walk($event, i)" @focus="at = i"
          >
            <span class="lf-score" v-if="cell.score !== null" :style="{ height: 100 * cell.score + '%' }"></span>
            <span class="lf-name">{{ cell.label }}</span>
            <span class="lf-mark" v-if="cell.fresh">new</span>
          </button>
          <button
            type="button" class="lf-rate" v-if="cell.rate" :tabindex="i === at ? 0 : -1" :data-rate="cell.part"
            :aria-label="'Learning rate of ' + cell.title + ': ' + cell.rate + '. Change it.'" @click="$emit('rate', cell.part)"
          >{{ cell.rate }}</button>
        </div>
      </div>
      <label class="lf-text">
        <span>trainable_layers</span>
        <input
          type="text" :value="text" @input="typed" spellcheck="false" autocomplete="off" autocapitalize="off"
          :aria-invalid="state.error ? 'true' : 'false'" aria-describedby="lf-layers-told"
          :placeholder="state.open"
        />
      </label>
      <div id="lf-layers-told" :class="state.error ? 'lf-refused' : 'lf-hint'" :role="state.error ? 'alert' : null">
        {{ state.error || state.hint }}
      </div>
    </div>`,
};
